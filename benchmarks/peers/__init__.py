"""What lopa is measured against, one file each. Every peer runs in a process of its own; `worker` is what they share."""
