"""transformers' models."""

from mutants.change import Change

CHANGES = (
    Change(
        "a token id as large as the vocabulary",
        "python/pcp_mla/integrations/transformers/requests.py",
        "not 0 <= token < vocabulary",
        "not 0 <= token <= vocabulary",
        "tests/test_integration_inputs.py::test_token_ids_that_are_none",
    ),
    Change(
        "a prefix of a negative request",
        "python/pcp_mla/integrations/transformers/requests.py",
        "if not 0 <= request < len(lengths):",
        "if not request < len(lengths):",
        "tests/test_integration_transformers.py::test_bad_prefix",
    ),
    Change(
        "blocks of the last requests leak",
        "python/pcp_mla/integrations/transformers/context.py",
        "        self.blocks.release(self.requests)\n",
        "",
        "tests/test_integration_inputs.py::test_blocks_of_steps_are_given_back",
    ),
    Change(
        "ranks with other texts agree",
        "python/pcp_mla/integrations/transformers/agreement.py",
        "return [value.lengths, value.history]",
        "return [value.lengths]",
        "tests/test_integration_ranks.py::test_every_rank_says_what_differs",
    ),
    Change(
        "a model over several ranks is for nobody",
        "python/pcp_mla/integrations/transformers/turns.py",
        "if user is not self._maker and user.is_alive():",
        "if user.is_alive():",
        "tests/test_integration_threads.py::test_one_thread_over_several_ranks",
    ),
)
