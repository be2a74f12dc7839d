"""What tenants may use and what they have used: rates, quotas, and durable counters without any content."""
