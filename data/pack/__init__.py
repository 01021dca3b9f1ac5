"""Ids to rows on the disk, whole or absent."""
