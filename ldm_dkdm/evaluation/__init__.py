"""How good a student is: its agreement with the teacher, without data."""
