"""Where text comes from: files, the Hub, mixtures, the built-in text; and its cleaning."""
