// How a plan reaches a GPU: the copy of the step buffer and plan_expand, issued by one plain call. The planner finds it by address;
// the dispatcher, its boxed arguments and torch's copy cost several times as much as what they issue.
#pragma once
#include <cstddef>
#include <cstdint>

#include "request_table.h"

namespace pcp_mla {

struct PlanSubmission {
  const void* host;
  void* device;
  int64_t bytes;
  void* copied;  // cudaEvent_t, recorded behind the copy
  int32_t device_index;
  ExpandJob job;
};

// Both return null or what went wrong.
struct PlanTransport {
  size_t submission_bytes;  // sizeof(PlanSubmission) where it was compiled: another one is a library of another version
  const char* (*wait)(void* copied);
  const char* (*submit)(const PlanSubmission&);
};

}  // namespace pcp_mla
