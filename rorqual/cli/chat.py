def chat() -> None:
    """chat"""
