"""The ground: what more than one room needs and no library gives. It imports no room."""
