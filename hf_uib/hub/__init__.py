"""What is published of a run: adapter, merged model, card and deletion report."""
