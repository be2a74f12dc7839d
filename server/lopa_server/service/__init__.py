"""The gRPC face: thin servicers, handlers that know no gRPC, and one place that turns errors into statuses."""
