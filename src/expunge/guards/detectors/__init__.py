"""What notices that a request, a state or an answer is about something that is to be forgotten."""
