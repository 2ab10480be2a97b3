"""How often a small model solves word problems: the problems, their tokens and the scoring."""
