"""Generated from proto/lopa/v1 by `make proto`. Do not edit."""
