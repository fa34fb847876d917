"""From limits to what is shipped: finalists, the last race, the bundle."""
