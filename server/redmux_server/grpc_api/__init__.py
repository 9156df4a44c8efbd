"""The gRPC door: servicers, and the interceptor around them."""
