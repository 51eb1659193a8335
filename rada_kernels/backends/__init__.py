"""The backends: each composes the three steps of the data's way for one kind of device."""
