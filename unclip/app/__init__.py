"""The web page: `unclip app`."""
