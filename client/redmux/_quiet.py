"""Imports gRPC so that it writes nothing but errors to stderr, where its failures are exceptions.

It reads GRPC_VERBOSITY, which counts where it is set, when it is imported, and from it alone.
"""

import os

if "GRPC_VERBOSITY" in os.environ:
    import grpc
else:
    os.environ["GRPC_VERBOSITY"] = "ERROR"
    import grpc  # noqa: F401

    del os.environ["GRPC_VERBOSITY"]
