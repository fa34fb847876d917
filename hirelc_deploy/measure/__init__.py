"""What a device says: backends, the timing protocol, accuracy of exported files, machine descriptions."""
