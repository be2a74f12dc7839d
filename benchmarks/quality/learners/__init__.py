"""What is tuned for one user, method by method, behind one small protocol."""
