"""pcp_mla inside other libraries, one file each. Importing this package imports none of them."""
