"""Memory: how much a run may take, how much its sizes take, and which sizes follow from that."""
