"""The wire contract's rules that the .proto files can't state: errors, tensor bytes, digests. Used by both sides."""
