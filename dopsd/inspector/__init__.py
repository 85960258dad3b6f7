"""One HTML page that shows what a run learnt: read from its folder, self-contained, without a server."""
