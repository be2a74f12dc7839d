"""Tests of the paper's own tasks."""
