"""What stands between a backbone's maps and a dense head. One file per paper."""
