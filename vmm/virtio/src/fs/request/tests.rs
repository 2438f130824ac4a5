// SPDX-License-Identifier: Apache-2.0
use super::*;

/// Every opcode that the server knows, with a well-formed body.
fn well_formed() -> Vec<(u32, Vec<u8>)> {
    let setattr = vec![0; 88];
    let transfer = transfer(1, 0, 8);
    let xattr = [words(&[3, 0, 0, 0]), b"user.a\0abc".to_vec()].concat();
    let forgets = [words(&[2, 0]), vec![1; 32]].concat();
    vec![
        (opcode::INIT, vec![0; 64]),
        (opcode::BATCH_FORGET, forgets),
        (opcode::LOOKUP, b"name\0".to_vec()),
        (opcode::FORGET, vec![0; 8]),
        (opcode::SETATTR, setattr),
        (opcode::SYMLINK, b"name\0target\0".to_vec()),
        (opcode::MKNOD, [vec![0; 16], b"name\0".to_vec()].concat()),
        (opcode::MKDIR, [vec![0; 8], b"name\0".to_vec()].concat()),
        (opcode::UNLINK, b"name\0".to_vec()),
        (opcode::RMDIR, b"name\0".to_vec()),
        (opcode::RENAME, [vec![0; 8], b"old\0new\0".to_vec()].concat()),
        (opcode::RENAME2, [vec![0; 16], b"old\0new\0".to_vec()].concat()),
        (opcode::LINK, [vec![0; 8], b"name\0".to_vec()].concat()),
        (opcode::OPEN, vec![0; 8]),
        (opcode::CREATE, [vec![0; 16], b"name\0".to_vec()].concat()),
        (opcode::TMPFILE, vec![0; 16]),
        (opcode::READ, transfer.clone()),
        (opcode::READDIR, transfer.clone()),
        (opcode::READDIRPLUS, transfer.clone()),
        (opcode::WRITE, [transfer, vec![7; 8]].concat()),
        (opcode::RELEASE, vec![0; 8]),
        (opcode::RELEASEDIR, vec![0; 8]),
        (opcode::FSYNC, vec![0; 12]),
        (opcode::FSYNCDIR, vec![0; 12]),
        (opcode::SETXATTR, xattr),
        (opcode::GETXATTR, [vec![0; 8], b"user.a\0".to_vec()].concat()),
        (opcode::LISTXATTR, vec![0; 4]),
        (opcode::REMOVEXATTR, b"user.a\0".to_vec()),
        (opcode::FALLOCATE, vec![0; 28]),
        (opcode::LSEEK, vec![0; 20]),
        (opcode::COPY_FILE_RANGE, vec![0; 56]),
    ]
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn transfer(handle: u64, offset: u64, size: u32) -> Vec<u8> {
    [&handle.to_le_bytes()[..], &offset.to_le_bytes(), &words(&[size, 0, 0, 0, 0, 0])].concat()
}

/// Decodes a body behind a header that says its true length.
fn decode_body(code: u32, body: &[u8]) -> Result<Request<'_>, DecodeError> {
    let given = IN_HEADER_LEN + body.len();
    let length = u32::try_from(given).unwrap();
    decode(&Header { length, opcode: code, unique: 1, node: 1, uid: 0, gid: 0 }, body, given)
}

#[test]
fn the_header_is_read() {
    let bytes: Vec<u8> = (0..40).collect();

    let header = Header::decode(&bytes).unwrap();

    assert_eq!((header.length, header.opcode), (0x0302_0100, 0x0706_0504));
    assert_eq!((header.unique, header.node), (0x0f0e_0d0c_0b0a_0908, 0x1716_1514_1312_1110));
    assert_eq!((header.uid, header.gid), (0x1b1a_1918, 0x1f1e_1d1c));
    assert_eq!(Header::decode(bytes.get(..39).unwrap()), None);
}

#[test]
fn well_formed_requests_are_decoded() {
    for (code, body) in well_formed() {
        let request = decode_body(code, &body);
        assert!(!matches!(request, Err(_) | Ok(Request::Unsupported)), "{code}: {request:?}");
    }
}

#[test]
fn every_truncation_is_refused() {
    for (code, body) in well_formed() {
        // Older guests end INIT after its 16th byte.
        let least = if code == opcode::INIT { 16 } else { body.len() };
        for length in 0..least {
            let request = decode_body(code, body.get(..length).unwrap());
            assert!(request.is_err(), "{code} with {length} bytes: {request:?}");
        }
    }
}

#[test]
fn no_bytes_make_it_panic() {
    for code in (0..64).chain([4096, u32::MAX]) {
        for filling in [0, 1, b'/', b'.', 0x7f, 0xff] {
            for length in [0, 1, 4, 8, 16, 24, 40, 88, 300, 5000] {
                let _ = decode_body(code, &vec![filling; length]);
            }
        }
    }
}

#[test]
fn a_length_that_is_not_true_is_refused() {
    let header = |length, code| Header { length, opcode: code, unique: 1, node: 1, uid: 0, gid: 0 };
    let huge = MAX_REQUEST_LEN + 1;

    for (length, given) in [(0, 44), (39, 39), (43, 44), (45, 44), (u32::MAX, 44)] {
        let result = decode(&header(length, opcode::GETATTR), &[0; 4], given);
        assert!(matches!(result, Err(DecodeError::Length { .. })), "{length} of {given}: {result:?}");
    }
    let result = decode(&header(u32::try_from(huge).unwrap(), opcode::LOOKUP), &[0; 4], huge);
    assert_eq!(result, Err(DecodeError::Length { said: huge, given: huge }));
}

#[test]
fn write_needs_all_of_its_data() {
    let whole = [transfer(1, 4, 8), vec![7; 8]].concat();
    let short = [transfer(1, 4, 9), vec![7; 8]].concat();
    let huge = [transfer(1, 4, MAX_IO_LEN + 1), vec![7; 8]].concat();
    let far = [transfer(1, u64::MAX, 8), vec![7; 8]].concat();

    let expected = Transfer { handle: 1, offset: 4, size: 8, write_flags: 0 };
    assert_eq!(decode_body(opcode::WRITE, &whole), Ok(Request::Write(expected)));
    for body in [short, huge, far] {
        assert_eq!(decode_body(opcode::WRITE, &body), Err(DecodeError::Range));
    }
}

#[test]
fn names_are_checked_wherever_they_are() {
    let long = [vec![b'n'; 256], vec![0]].concat();
    let bad: [(&[u8], DecodeError); 6] = [
        (b"\0", DecodeError::Name),
        (b".\0", DecodeError::Name),
        (b"..\0", DecodeError::Name),
        (b"a/b\0", DecodeError::Name),
        (&long, DecodeError::NameTooLong),
        (b"endless", DecodeError::Unterminated),
    ];
    let before = [
        (opcode::LOOKUP, vec![]),
        (opcode::SYMLINK, vec![]),
        (opcode::MKNOD, vec![0; 16]),
        (opcode::MKDIR, vec![0; 8]),
        (opcode::UNLINK, vec![]),
        (opcode::RMDIR, vec![]),
        (opcode::RENAME, vec![0; 8]),
        (opcode::RENAME, [vec![0; 8], b"old\0".to_vec()].concat()),
        (opcode::RENAME2, [vec![0; 16], b"old\0".to_vec()].concat()),
        (opcode::LINK, vec![0; 8]),
        (opcode::CREATE, vec![0; 16]),
    ];

    for (code, arguments) in &before {
        for (name, error) in bad {
            let body = [arguments.as_slice(), name].concat();
            assert_eq!(decode_body(*code, &body), Err(error), "{code} {name:?}");
        }
    }
}

#[test]
fn targets_attributes_and_times_have_bounds() {
    let target = |length: usize| [b"name\0".to_vec(), vec![b't'; length], vec![0]].concat();
    let value = |size: u32, given: usize| [words(&[size, 0, 0, 0]), b"user.a\0".to_vec(), vec![1; given]].concat();
    let mut setattr = vec![0; 88];
    setattr.splice(56..60, 1_000_000_000_u32.to_le_bytes());

    assert!(decode_body(opcode::SYMLINK, &target(4095)).is_ok());
    assert_eq!(decode_body(opcode::SYMLINK, &target(4096)), Err(DecodeError::NameTooLong));
    assert!(decode_body(opcode::SETXATTR, &value(65_536, 65_536)).is_ok());
    assert_eq!(decode_body(opcode::SETXATTR, &value(65_537, 65_536)), Err(DecodeError::Range));
    assert_eq!(decode_body(opcode::SETXATTR, &value(10, 9)), Err(DecodeError::Truncated));
    assert_eq!(decode_body(opcode::REMOVEXATTR, b"\0"), Err(DecodeError::Range));
    assert_eq!(decode_body(opcode::REMOVEXATTR, &[vec![b'x'; 256], vec![0]].concat()), Err(DecodeError::NameTooLong));
    assert_eq!(decode_body(opcode::SETATTR, &setattr), Err(DecodeError::Range));
}

#[test]
fn a_batch_of_forgets_is_read_in_pairs() {
    let count = |count: u32| [words(&[count, 0]), words(&[7, 0, 1, 0, 8, 0, 2, 0])].concat();

    let body = count(2);
    let Ok(Request::BatchForget { forgets }) = decode_body(opcode::BATCH_FORGET, &body) else { panic!() };

    assert_eq!(forgets.iter().collect::<Vec<_>>(), [(7, 1), (8, 2)]);
    for number in [3, u32::MAX] {
        assert_eq!(decode_body(opcode::BATCH_FORGET, &count(number)), Err(DecodeError::Truncated));
    }
}
