def serve() -> None:
    """serve"""
