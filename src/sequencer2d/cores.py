"""How many cores there are for us."""


def num_cores() -> int:
    """Cores that this process may use: its affinity and a container's quota of time (control groups), rounded up."""
    from joblib import cpu_count  # a quarter of a second to import

    return cpu_count()
