"""What the losses should be: plain Python loops over floats, one line of mathematics each."""
