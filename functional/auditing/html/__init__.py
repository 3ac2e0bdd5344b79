"""What the page of a report shows, as JSON values; and the page itself, that draws them."""
