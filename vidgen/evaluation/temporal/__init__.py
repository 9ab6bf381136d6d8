"""`vidgen eval temporal`: how steady any clips are in time, whoever made them."""
