"""Tables, pictures, pages and files of an audit."""
