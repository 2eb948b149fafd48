"""A batch on the device: laid out, planned, run."""
