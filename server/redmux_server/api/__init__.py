"""What callers see: validation, the generation service and its gRPC skin."""
