"""plan_expand: a step's per-token arrays and cache slots from its request table, in one launch.

Not for users, who have :class:`pcp_mla.PCPPlanner`: whoever calls it has checked everything.
"""

from .registry import fake_in_place, register

plan_expand = register("plan_expand", fake_in_place)
