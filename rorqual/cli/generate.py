def generate() -> None:
    """generate"""
