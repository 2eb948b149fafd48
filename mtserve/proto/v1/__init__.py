"""Generated gRPC stubs; `scripts/generate_proto.py` writes them."""
