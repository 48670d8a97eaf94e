//! What an error of hyper's rests on: its own words are few.

use std::error::Error;

/// An error and what it rests on, one after the other.
pub fn causes<'a>(first: Option<&'a (dyn Error + 'static)>) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(first, |cause| (**cause).source())
}

/// What of that is HTTP/2's own.
pub fn of_http2<'a>(first: Option<&'a (dyn Error + 'static)>) -> impl Iterator<Item = &'a h2::Error> {
    causes(first).filter_map(|cause| cause.downcast_ref())
}
