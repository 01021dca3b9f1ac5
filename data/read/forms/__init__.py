"""The forms that text comes in: how a file is opened, and a reader for each kind."""
