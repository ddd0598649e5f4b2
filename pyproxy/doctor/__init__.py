"""What is wrong with this node, as far as Services are concerned: facts first, then findings."""
