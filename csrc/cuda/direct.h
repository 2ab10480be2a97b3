// What direct.cu makes its table of: each file of kernels adds its own ops.
#pragma once
#include <exception>
#include <string>
#include <type_traits>

#include "../direct_ops.h"

namespace pcp_mla::cuda {

void add_merges(DirectOps& ops);
void add_concat_k(DirectOps& ops);
void add_latent_cache(DirectOps& ops);
void add_kv_up_project(DirectOps& ops);
void add_attention(DirectOps& ops);
void add_publish_latents(DirectOps& ops);
void add_exchange_heads(DirectOps& ops);

// A call past the dispatcher: what it returns, if it does, or the message of what it throws, which lasts until the thread's next
// call.
template <auto call, typename... Args>
const char* directly(Args... args) {
  thread_local std::string message;
  try {
    if constexpr (std::is_void_v<decltype(call(args...))>) {
      call(args...);
      return nullptr;
    } else {
      return call(args...);
    }
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace pcp_mla::cuda
