"""The way to the Hub: who is asking, the published folder, its card, and the uploads during a run."""
