"""What shows a run to everybody: the demo, and the page that needs no server."""
