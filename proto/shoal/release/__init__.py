"""How a model reaches a node: chunks, transfer, trust, slots, self-test and the client that binds them."""
