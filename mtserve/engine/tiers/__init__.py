"""States between the device and the host: reserved, brought, saved, counted."""
