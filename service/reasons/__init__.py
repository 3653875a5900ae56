"""Why a layout won, in words and as a picture.

May import nothing else of `service`.
"""
