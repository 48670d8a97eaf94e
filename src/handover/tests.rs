use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::thread;

use proptest::prelude::*;

use super::shelf::Shelf;
use super::wire::{self, Request, Word};
use super::*;
use crate::mutation::mutated;

/// A parent in a thread: offers what it has, answers until its worker is gone, and gives its shelf back.
fn parent_over(socket: OwnedFd, mut shelf: Shelf) -> thread::JoinHandle<Shelf> {
    thread::spawn(move || {
        for key in shelf.keys() {
            wire::send(socket.as_fd(), &Word::Offer { key: key.clone() }, shelf.get(key)).unwrap();
        }
        wire::send(socket.as_fd(), &Word::Offered { count: shelf.len() }, None).unwrap();
        while let Ok(Some((request, fd))) = wire::receive::<Request>(socket.as_fd()) {
            let answer = shelf.answer(request, fd);
            if wire::send(socket.as_fd(), &answer, None).is_err() {
                break;
            }
        }
        shelf
    })
}

fn start(shelf: Shelf) -> (Keeper, Vec<(ListenerKey, OwnedFd)>, thread::JoinHandle<Shelf>) {
    let (ours, theirs) = wire::pair().unwrap();
    let parent = parent_over(ours, shelf);
    let (keeper, inherited) = Keeper::over(theirs).unwrap();
    (keeper, inherited, parent)
}

fn key(pod: &str) -> ListenerKey {
    ListenerKey { pod: PodUid::new(pod), role: Role::Tunnel, family: Family::V6, netns: (4, 4_026_531_840) }
}

#[test]
fn the_next_worker_inherits_what_the_last_one_kept_with_the_connections_that_wait_in_it() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (keeper, inherited, parent) = start(Shelf::new(8));
    assert!(inherited.is_empty());
    keeper.keep(&key("a"), listener.as_fd()).unwrap();
    drop((keeper, listener));
    let shelf = parent.join().unwrap();

    let waiting = TcpStream::connect(address).unwrap();
    let (_keeper, mut inherited, _parent) = start(shelf);
    let (held, fd) = inherited.pop().unwrap();
    assert_eq!(held, key("a"));
    let (_, from) = TcpListener::from(fd).accept().unwrap();
    assert_eq!(from, waiting.local_addr().unwrap());
}

#[test]
fn a_forgotten_listener_is_closed_when_forget_returns() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (keeper, _, _parent) = start(Shelf::new(8));
    keeper.keep(&key("a"), listener.as_fd()).unwrap();
    drop(listener);
    TcpStream::connect(address).unwrap();
    keeper.forget(&key("a"));
    assert_eq!(TcpStream::connect(address).unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
}

#[test]
fn a_full_parent_refuses_by_name_and_keeps_what_it_has() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (keeper, _, parent) = start(Shelf::new(1));
    keeper.keep(&key("a"), listener.as_fd()).unwrap();
    let refusal = keeper.keep(&key("b"), listener.as_fd()).unwrap_err().to_string();
    assert!(refusal.contains("pod b") && refusal.contains("ulimit -n"), "{refusal}");
    keeper.keep(&key("a"), listener.as_fd()).expect("one that it holds may be replaced");
    drop(keeper);
    assert_eq!(parent.join().unwrap().len(), 1);
}

#[test]
fn a_parent_that_is_gone_is_an_error_and_not_a_hang() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (ours, theirs) = wire::pair().unwrap();
    wire::send(ours.as_fd(), &Word::Offered { count: 0 }, None).unwrap();
    let (keeper, _) = Keeper::over(theirs).unwrap();
    drop(ours);
    assert_eq!(keeper.keep(&key("a"), listener.as_fd()).unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
    keeper.forget(&key("a"));
}

#[test]
fn without_a_parent_nothing_is_kept_and_nothing_fails() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let keeper = Keeper::detached();
    keeper.keep(&key("a"), listener.as_fd()).unwrap();
    keeper.forget(&key("a"));
}

#[test]
fn no_descriptor_is_inherited_by_programs_that_the_worker_starts() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (keeper, _, parent) = start(Shelf::new(8));
    keeper.keep(&key("a"), listener.as_fd()).unwrap();
    drop(keeper);
    let (_keeper, inherited, _parent) = start(parent.join().unwrap());
    let flags = nix::fcntl::fcntl(&inherited[0].1, nix::fcntl::FcntlArg::F_GETFD).unwrap();
    assert!(nix::fcntl::FdFlag::from_bits_retain(flags).contains(nix::fcntl::FdFlag::FD_CLOEXEC));
}

fn messages() -> Vec<Vec<u8>> {
    let keep = wire::Action::Keep { key: key("u-1") };
    let forget = wire::Action::Forget { key: key("u-2") };
    let words = [
        serde_json::to_vec(&Request { seq: 1, action: keep }),
        serde_json::to_vec(&Request { seq: u64::MAX, action: forget }),
        serde_json::to_vec(&Word::Offer { key: key("u-1") }),
        serde_json::to_vec(&Word::Offered { count: 7 }),
        serde_json::to_vec(&Word::Answer { seq: 3, refused: Some("no room".to_owned()) }),
    ];
    words.map(Result::unwrap).into()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn messages_with_changed_bytes_are_refused_or_answered_and_never_hold_what_has_no_listener(
        said in prop::collection::vec(mutated(messages()), 1..6),
    ) {
        let mut shelf = Shelf::new(2);
        for message in said {
            let (ours, theirs) = wire::pair().unwrap();
            if nix::unistd::write(&ours, &message).is_err() {
                continue;
            }
            drop(ours);
            match wire::receive::<Request>(theirs.as_fd()) {
                Ok(Some((request, fd))) => {
                    let Word::Answer { .. } = shelf.answer(request, fd) else { panic!("a request was not answered") };
                }
                Ok(None) => prop_assert!(message.is_empty()),
                Err(_) => {}
            }
        }
        prop_assert_eq!(shelf.len(), 0);
    }

    #[test]
    fn a_parent_that_babbles_is_an_error_and_no_panic(said in prop::collection::vec(mutated(messages()), 1..6)) {
        let (ours, theirs) = wire::pair().unwrap();
        for message in said {
            // An empty packet cannot be told from the end.
            let _ = nix::unistd::write(&ours, &message);
        }
        drop(ours);
        if let Ok((_, inherited)) = Keeper::over(theirs) {
            prop_assert!(inherited.is_empty());
        }
    }
}
