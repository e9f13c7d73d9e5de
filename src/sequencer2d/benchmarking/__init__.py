"""Comparing speed and memory of contenders on the same work, on a CPU: each in a process of its own, all in turn."""
