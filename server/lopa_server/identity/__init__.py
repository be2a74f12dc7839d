"""Who calls: API keys, bearer tokens and client certificates become a `Caller` before any RPC is answered."""
