"""Which waiting requests make the next batch, and whose states the device is to hold for them."""
