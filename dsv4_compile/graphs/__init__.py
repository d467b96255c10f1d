"""The graph as mathematics: what nodes say, whether a subgraph says the same as a pattern, and how graphs are edited."""
