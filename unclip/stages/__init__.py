"""The stages of the stack: a network with its process, its sampling defaults and its encoder."""
