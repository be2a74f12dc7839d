"""A load generator for any running server: plan a workload, run it over gRPC, summarize what clients saw."""
