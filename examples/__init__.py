"""Small programs that show what the library does for networks of other fields than the tasks'."""
